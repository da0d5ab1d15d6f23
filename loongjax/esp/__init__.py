"""Elastic sequence parallelism itself: what a group's ranks compute, and what they exchange.

`prefill`   the ring over stripes, with retention
`history`   a chunk's attention to KV that is in the pool already
`decode`    multi-master decoding over KV that is spread over the group
`migrate`   moving KV between instances
`partials`  partial attention results on their way between ranks
`sampling`  from hidden states to tokens
`meta`      the small inputs of a program
"""
