// How far two images are apart.

/**
 * The mean and the largest absolute difference of two images' pixels, over red, green and blue, of 255;
 * and a canvas that shows the difference of every pixel, the largest as white.
 */
export async function difference(first, second) {
  const [a, b] = await Promise.all([first, second].map(pixelsOf));
  const apart = a.data.map((value, index) => Math.abs(value - b.data[index])); // of opaque images, 0 in every alpha
  const sum = apart.reduce((total, value) => total + value, 0);
  const largest = apart.reduce((most, value) => Math.max(most, value), 0);
  const shown = apart.map((value, index) => (index % 4 === 3 ? 255 : (255 * value) / (largest || 1)));
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: a.width, height: a.height });
  canvas.getContext("2d").putImageData(new ImageData(shown, a.width, a.height), 0, 0);
  return { mean: sum / (a.width * a.height * 3), largest, canvas };
}

async function pixelsOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
