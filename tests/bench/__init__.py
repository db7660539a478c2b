"""`./run bench`: Underpass beside no proxy, HAProxy, nginx, stunnel and Envoy, on the same two hosts in the same minutes.

Reading order: __main__, story (what is measured when), works, arms, peers/, measure, ratios, report.
"""
