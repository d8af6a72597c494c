"""An HTTP server for a pipeline, in the shape of the OpenAI images API.

`app` builds the FastAPI application, `server` runs it. Nothing is imported here: FastAPI and uvicorn come
with the extra `hqc[serve]`, and load only with the module that needs them.
"""
