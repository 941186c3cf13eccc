"""What goes over HTTP, in the order a request passes through: gate, api, posts."""
