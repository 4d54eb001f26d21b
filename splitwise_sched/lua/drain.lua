-- drain: an instance takes no further requests; what it holds it finishes.
--   KEYS     instance:<id>, decode-load
--   ARGV[2]  instance id
--   returns  1 | 0: the lease has lapsed

redis.call('ZREM', KEYS[2], ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'draining', 1)
while spill_all(ARGV[2], 100) == 100 do end
return 1
