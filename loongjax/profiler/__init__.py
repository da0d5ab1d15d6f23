"""`loongjax profile`: measures steps on the devices at hand and fits a cost model. Uses jax."""
