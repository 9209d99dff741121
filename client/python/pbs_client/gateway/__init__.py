"""pbs-gateway: the HTTP face of a node, as routers of prefill and decode expect it.

Modules: cli.py (flags, process), app.py (routes, the life of a request), admission.py
(bounds of requests and bodies), fields.py (typed access to a JSON body), job.py (what
every API's body has), apis.py (prompts and replies of each API), prepare.py (a body as
a request to the node), node.py and nodes.py (nodes over gRPC), delivery.py (replies to
clients that may leave), tokenizer.py and chat_template.py (a tokenizer folder),
metrics.py, errors.py, log.py.

Needs `pip install './client/python[gateway]'`.
"""
