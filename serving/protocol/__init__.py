"""Liftyard's gRPC interface; all but the `.proto` is generated, see `serving/rpc.py`."""
