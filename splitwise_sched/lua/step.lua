-- step: the KV of a request is on its decode instance, which owns it from here; prefill is out of it.
--   KEYS     request:<id>, queue
--   ARGV[2]  request id      [3] epoch      [4] decode instance      [5...] fields and values to note in the record
--   returns  1, also when it was done before | 0: this run is over, drop it

local id, r = ARGV[2], load_some(ARGV[2], {'state', 'epoch', 'decode', 'queue', 'queue_entry'})
if not r or r.epoch ~= ARGV[3] or r.decode ~= ARGV[4] then return 0 end
if r.state == 'decode' then return 1 end
if r.state ~= 'prefill' then return 0 end
remove_entry(r)
redis.call('HDEL', KEYS[1], 'queue_entry', 'queue')
redis.call('HSET', KEYS[1], 'state', 'decode', 'decoding_ms', now_ms(), unpack(ARGV, 5))
return 1
