"""The embedding service: `engine` and `api` know nothing of Ray, `app` puts them on Ray Serve or plain uvicorn."""
