"""The embedding service, to be read as a request comes: gate → api → engine → batcher.

`replica` is one process of it, `updates` brings new versions in, `app` picks what runs it: `ray_app` or, in one process,
`single`. Only `ray_app` knows Ray.
"""
