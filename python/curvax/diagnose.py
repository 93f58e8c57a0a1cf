"""x"""
Diagnosis = diagnose = None
