"""Which stream asked which: states of the token streams, the rows that the output reads.

And the way from tokens back to the inputs. It is read off the graph of the run with the questions
of `tracing`; there is no table of architectures.
"""
