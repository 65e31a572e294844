"""The program representation the stages exchange. Imports nothing of the project but its errors."""
