"""The control role: certificates, policy and services for the other roles; outcomes from them; the admin API."""
