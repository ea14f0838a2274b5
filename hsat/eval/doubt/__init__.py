"""Whether an attack failed where a model looks robust: masked gradients and their signs."""
