"""Replicas of one or several models as one service: each one's edge answers for all of them."""
