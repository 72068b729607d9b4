"""The quickstart: a study of three small models that it trains itself, with eval tasks that it brings along."""
