"""Dense float64 truth for the test-suite, written without curvax: explicit Jacobians, loss Hessians, linear solves."""
