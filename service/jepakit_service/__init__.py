"""The embedding service. Read it in the order a request passes through: gate → api → posts (in `http`) → engine → batcher (in `models`).

`replica` is one process of the service, `updates` brings in new versions, and `app` picks what runs it: `ray_driver`, which
puts `ray_app` on a Ray of its own, or `single` for one process. Only the modules called `ray_…` know about Ray.
"""
