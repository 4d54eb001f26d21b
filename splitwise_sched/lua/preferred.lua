-- preferred queues: a request may name instances that it would rather be prefilled on, where its prefix is cached, say.
-- It waits for the first of them that can take it, for a bound; then it spills into the common queue.
--   preferred:<instance>  STREAM  with group "prefill", read by that instance together with the common queue
--   preferred             ZSET    request id by the time (ms) at which it spills

local MAX_PREFERRED = 8

-- the queue of the first preferred instance that lives, prefills, and has few waiting for it; nil when there is none
local function preferred_queue(r)
  for instance in string.gmatch(r.prefer or '', '%S+') do
    local v = redis.call('HMGET', P .. 'instance:' .. instance, 'role', 'draining')
    local queue = 'preferred:' .. instance
    if v[1] and v[1] ~= 'decode' and not v[2] and redis.call('XLEN', P .. queue) < MAX_PREFERRED then return queue end
  end
  return nil
end

forget_preference = function(id, r)
  if r.prefer then redis.call('ZREM', P .. 'preferred', id) end
end

-- into its preferred queue if it may wait there, else into the common one; `also`: more to write into the record
local function place(id, r, also)
  local queue = r.prefer and preferred_queue(r)
  enqueue(id, r.epoch, r, queue, also)
  if queue then
    local wait_ms = redis.call('HGET', P .. 'request:' .. id, 'prefer_ms')
    redis.call('ZADD', P .. 'preferred', now_ms() + number(wait_ms), id)
  end
end

-- a request that waits in an instance's queue goes to the common one
local function spill(id)
  redis.call('ZREM', P .. 'preferred', id)
  local r = load(id)
  if not r or r.state ~= 'queued' or not r.queue_entry or r.queue == 'queue' then return end
  remove_entry(r)
  enqueue(id, r.epoch, r)
  count('spilled')
end

local function spill_due(limit)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'preferred', '-inf', now_ms(), 'LIMIT', 0, limit)) do
    spill(id)
  end
end

-- what waits for an instance that will not take it, a bounded number; returns how many entries went
local function spill_all(instance, limit)
  local queue, gone = 'preferred:' .. instance, 0
  for _, entry in ipairs(redis.call('XRANGE', P .. queue, '-', '+', 'COUNT', limit)) do
    local id
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'id' then id = entry[2][i + 1] end
    end
    local r = id and load(id)
    local is_its_own = r and r.queue == queue and r.queue_entry == entry[1]
    if is_its_own and r.state == 'queued' then
      spill(id)
    elseif not is_its_own then
      remove_entry({queue = queue, queue_entry = entry[1]})
    end
    -- Others are with the instance, which finishes them or is reaped.
    if not (is_its_own and r.state == 'prefill') then gone = gone + 1 end
  end
  return gone
end
