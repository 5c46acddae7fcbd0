"""An image of any size through a model of one size: where the tiles lie, their probabilities, how they blend."""
