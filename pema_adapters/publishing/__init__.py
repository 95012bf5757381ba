"""A merged model on the Hub, uploaded from its plan without a copy on disk.

`push.push_merged_to_hub` plans against one commit of the repository and again after a conflict; `plan_stream` makes a
planned file a file object for the Hub's client.
"""
