"""Did adaptation help, and which model to keep?"""
