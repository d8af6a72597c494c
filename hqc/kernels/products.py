"""An integer product by what its speed depends on, and the tile that it is computed in."""

from dataclasses import dataclass

__all__ = ["Product", "ProductTile"]


@dataclass(frozen=True)
class ProductTile:
    """Tile of an integer product with the warps and stages that hold it, and the programs that share a tile's sums."""

    rows: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclass(frozen=True, order=True)
class Product:
    """rows × outputs sums over taps·channels codes. rotation: the block that the kernel rotates packed weights with."""

    rows: int
    outputs: int
    channels: int
    taps: int = 1
    rotation: int = 1
    two_digits: bool = False

    def steps(self, tile: ProductTile) -> int:
        """Steps of the inner axis, of all splits together."""
        return self.taps * -(-self.channels // tile.channels)
