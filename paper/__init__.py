"""The paper in miniature: a toy task with an exact score, and the worked example of the README."""

import support.threads  # noqa: F401, first: how threads wait is said before torch is loaded
