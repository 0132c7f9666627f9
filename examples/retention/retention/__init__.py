"""A team's own package: who is worth winning back."""

LAPSED_BELOW = 1


def lapsed(orders: list[int]) -> list[bool]:
    """Whether each customer has lapsed, by their orders."""
    return [count < LAPSED_BELOW for count in orders]
