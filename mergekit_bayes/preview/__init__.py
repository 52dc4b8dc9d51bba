"""Which weights? Mixes of sources over a design, their scores, and the front between tasks.

design.py       which mixes to look at
surrogate.py    what the posteriors themselves predict at a mix, without data; ratios.py the same for thousands
polynomial.py   polynomials of the weights, fitted to scores
front.py        what is dominated, hypervolume, knee, max-min
"""
