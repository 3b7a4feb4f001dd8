"""How the lines of the benchmark's payload begin, unlike what vLLM prints: MORE a piece of an object, MARK its last."""

MARK, MORE = "sparkinstall-bench:", "sparkinstall-bench+"
