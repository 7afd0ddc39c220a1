"""The defaults that solvers, plans, loss and flags share."""

# Entropic regularization, in units of the cosine cost.
EPSILON = 0.03
# Additive error of the combinatorial plan, as a share of the cost's range.
ADDITIVE_ERROR = 0.01
