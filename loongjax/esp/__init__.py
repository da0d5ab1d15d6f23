"""Elastic sequence parallelism itself: what a group's ranks compute, and what they exchange.

`striping`  which token of a prompt goes to which rank
`prefill`   the ring over stripes, with retention
`decode`    multi-master decoding over KV that is spread over the group
"""
