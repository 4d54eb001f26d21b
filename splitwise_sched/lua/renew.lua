-- renew: an instance renews its lease and reports its load.
--   KEYS     instance:<id>
--   ARGV[2]  lease ms      [3...] fields and values of the record
--   returns  1 | 0: the lease has lapsed, what the instance held is no longer its own

if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'seen_ms', now_ms(), unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[2]))
return 1
