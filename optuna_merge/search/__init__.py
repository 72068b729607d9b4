"""What is searched and how: the parameters, the samplers that draw them, the pruners that end trials early."""
