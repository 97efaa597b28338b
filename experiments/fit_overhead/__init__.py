"""What does fitting cost beside the network calls?"""
