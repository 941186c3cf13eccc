"""Clients of the embedding service: `Client`, and `AsyncClient` with the same methods.

Images are sent as their original bytes, many per request, and vectors come back as raw float32. Both clients are thin
loops around what they share: `Job` knows what to send and what an answer means, `Attempts` knows when to retry.
"""

from jepakit.client.async_client import AsyncClient
from jepakit.client.client import Client
from jepakit.client.models import ModelInfo

__all__ = ["AsyncClient", "Client", "ModelInfo"]
