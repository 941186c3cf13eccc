"""Exit 0 when the service in this container is ready, else 1: the image's HEALTHCHECK."""

import http.client
import os
import sys

# Not urllib, which would send the question to a proxy that the environment names.
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["JEPAKIT_SERVE_PORT"]), timeout=5)
try:
    connection.request("GET", "/readyz")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"nothing answers: {error}")
