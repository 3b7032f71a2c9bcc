"""What trial processes run. The parent starts them by module name, reads what they write, and imports nothing here.

gatrain.tune.host (imports once, forks) -> session (one rank's requests) -> measure (one size), memory, batches
                                                                         -> full_step (full optimizer steps)
"""
