"""What ran: every softmax(QK^T)V and every input of one forward run.

The tap (`tap`) is a function mode around the run: it writes down attention calls and leaves, and
changes nothing. `module_stack` tells it which module is running, by hooks that last as long.

The model is left as found (`restore`): a run has weights without gradients, copies of the buffers
that it writes into and random numbers of its own (`own_state`), and what has to be changed where
other threads see it is counted (`shared_state`), so that the last run out puts it back.
"""
