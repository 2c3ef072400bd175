"""The paper in miniature: a toy task with an exact score, and the worked example of the README."""
