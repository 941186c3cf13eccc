"""The embedding service. Read it in the order a request passes through: gate → api → engine → batcher.

`replica` is one process of the service, `updates` brings in new versions, and `app` picks what runs it: `ray_app`, or
`single` for one process. Only `ray_app` knows about Ray.
"""
