"""What a merge will write: planned files made of segments, readable at any offset.

`segments` has the kinds of segments, `plan` the files and figures of a merge, `dtype_cast` the casts between float32,
bfloat16 and float16. No module here knows where a plan comes from or who reads it.
"""
