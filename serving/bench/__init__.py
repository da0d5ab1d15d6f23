"""A server seen from outside, measured: load (`loongjax bench serve`), chaos (`bench chaos`).

Server and client are always processes of their own.
"""
