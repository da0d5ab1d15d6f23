"""Attention and KV kernels: arrays in, arrays out; they know nothing of requests.

`partials`           partial attention results, and how they merge
`striped_attention`  one ring step of causal attention between two stripes
`paged_attention`    queries over the KV that lies in a pool's blocks
`kv_write`           chosen tokens into pool slots
`tpu`, `gpu`         the last three again, as Pallas kernels for hardware
`backends`           which of them an engine runs
`reference`          the same in plain float32, slow and obvious: what tests compare with

Letters in names: T tokens, H query heads, G KV heads, D head size, R rows (one query
each), L layers, S pool slots, N table entries.
"""
