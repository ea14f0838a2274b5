"""How certain numbers are: intervals over patients, paired differences, exact binomial bounds."""
