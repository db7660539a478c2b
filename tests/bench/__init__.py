"""`./run bench`: Underpass beside no proxy, HAProxy, nginx, stunnel and Envoy, on the same two hosts.

Reading order: __main__, story (what is measured when), works, arms, peers/, measure, ratios, report.
"""
