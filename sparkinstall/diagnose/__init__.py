"""Known failures in logs: search, signatures, and the judgement of cause and consequence."""
