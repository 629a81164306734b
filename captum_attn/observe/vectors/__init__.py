"""What a block does to its tokens' vectors: skip connections, branches, output projections.

Only methods that follow vectors beside attention (VTranM) come here.
"""
