"""One input of the user's own, explained: ``captum-attn explain-text`` and ``explain-image``."""
