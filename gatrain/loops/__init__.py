"""For training loops that were written for another framework: its words, this package's exactness.

`accumulate` (in `gatrain.train.accumulate`) takes a whole window at once. The forms here leave the passes
where they stand in the user's loop: `Accumulator` reads a window ahead and is a context around each
micro-step; `AccumulatingOptimizer` reads nothing ahead and steps once in K calls; `accumulate_in_fit` splits
the batches of a Keras model's ``fit``. FROM_OTHER_FRAMEWORKS.md has an example of each.
"""
