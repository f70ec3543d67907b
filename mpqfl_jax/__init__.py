"""How much can a server read out of a federated update, and at what cost?"""
