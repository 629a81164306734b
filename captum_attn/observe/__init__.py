"""Observes attention in the user's own model. This is the map of the house.

An attribution goes through six steps, and each step has one place::

    1 observe     the model runs once, and is watched           capture/
                  pixels ──▶ call 0 ──▶ call 1 ──▶ output       every softmax(QK^T)V is a call
    2 wire        which tokens asked, which answered            streams/wiring.py
                  input ──▶ state 0 ──▶ state 1                 which token is where: tracing/
    3 weigh       A, grad A ──▶ A-bar                           attr/<the method>.py
    4 propagate   R = keep * R_query + A-bar R_key              attr/_propagate.py
    5 read out    the output reads row 0 of state 1             streams/readout.py
    6 map back    relevance of tokens ──▶ of pixels             streams/to_inputs.py

Steps 1, 2, 5 and 6 are here; 3 and 4 are in `captum_attn.attr`, whose `_engine.py` calls them all
in this order. The rooms, each of which imports only from those before it:

- `capture/`    what ran: attention calls, inputs, and the model left as it was found;
- `operators/`  what each operation was, for the rules of relevance propagation;
- `tracing/`    where each token goes: proven by the graph, or asked of autograd (token maps);
- `streams/`    which stream asked which: states, the readout, and the way back to the inputs;
- `observation.py`  one observed run, with all of the above;
- `interventions.py`  such a run once more, with keys hidden or a map replaced;
- `vectors/`    what a block does to vectors beside attention, for methods that ask (VTranM).

Words:

- attention call: one softmax(QK^T)V that ran, with its Q, K, V and A.
- block: some queries of a call, in all its heads and windows.
- window: one of several sequences that a call attends within (Swin's windows, video frames).
- stream: tokens that the model updates layer by layer, such as a text or an image.
- state: one version of a stream; an attention call makes the next one.
- source: the tokens that relevance is given to, with the inputs that enter them.
- token map: the position in a later state at which each earlier token enters.
- input map: the token that each element of an input enters, a pixel or a word.
- readout: the rows of the last states that the explained output reads, with their weights.
- R: relevance of a state's tokens for those of every source, R[s,x] (B, n_s, n_x).
- rule: what an attention call does to R; a linear one has a share to keep, and A-bar.
- flow: what one stream hands to another about one source, in a rule that is not linear.
- run: what a method sees: its options, the calls, the gradients and the readout.
"""

from captum_attn.observe.capture.attention_call import AttentionCall, Block
from captum_attn.observe.observation import Observation, observe

__all__ = ["AttentionCall", "Block", "Observation", "observe"]
