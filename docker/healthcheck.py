"""Exit 0 when the service in this container is ready, else 1: the image's HEALTHCHECK."""

import http.client
import os
import sys

port = os.environ["JEPAKIT_SERVE_PORT"]
if "://" in port:  # set by Kubernetes for a service named `jepakit-serve`; jepakit's service ignores it too
    port = "8000"
# Not urllib, which would send the request to a proxy named in the environment.
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
try:
    connection.request("GET", "/readyz")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"nothing answers: {error}")
