"""Float graph + rules + observed ranges -> QuantPlan, and a plan -> another of the same model."""
