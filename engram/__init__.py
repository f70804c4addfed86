"""Engram: a transformer whose sparse capacity can be experts, n-gram memory, or both.

One letter legend holds for the whole package. A tensor's suffix names its logical dimensions, `x_BTD`:

    B  batch                    E  routed experts            G  lookups of a token in one layer
    T  positions                K  routed experts a token         (orders x hash heads)
    N  tokens, B * T            R  routed tokens, N * K      P  width of one table row
    D  d_model                  F  hidden width of an FFN    S  rows of all tables of one layer
    V  vocabulary               H  attention heads           M  residual streams
    L  memory layers            C  channels of a head        J  convolution taps
"""
