-- Make what was read from the cold tier hot, if the lease still stands.
-- KEYS: hot hash, namespaces, seen, shard
-- ARGV: token, checkpoint record, ttl in ms ('0' = none), ttl of the namespaces, the last later
--       checkpoint that the cold tier has writes of (or ''), bit of the thread and namespace in `seen`,
--       one record of writes for each task...
-- Returns 1 if it became hot, else 0.
local hot = KEYS[1]
local record = unframe(ARGV[2])
local generation, id = record[2], record[4]
local known = redis.call('HMGET', hot, 'l', 'g')
if known[1] ~= ARGV[1] or known[2] ~= generation or redis.call('HGET', KEYS[4], 'g') ~= generation then return 0 end
-- Writes of a later checkpoint may be here before it: whoever reads that one must ask the cold tier.
local uncertain = redis.call('HGET', hot, 'u') or ''
local early = uncertain > ARGV[5] and uncertain or ARGV[5]
if early <= id then early = '' end
for _, name in ipairs(redis.call('HKEYS', hot)) do
  if string.sub(name, 1, 2) == 'w:' then
    local of = string.sub(name, 3, string.find(name, '\0', 3, true) - 1)
    if of > id and of > early then early = of end
  end
end
renew(hot, generation, true)
if early ~= '' then redis.call('HSET', hot, 'u', early) end
redis.call('HSET', hot, 'g', generation, 'id', id, 'p', record[5], 'c', record[6], 'm', record[7], 'k', record[8])
for i = 9, #record, 4 do
  redis.call('HSET', hot, 'v:' .. record[i], record[i + 1], 'b:' .. record[i], record[i + 3])
  if record[i + 2] == '*' then redis.call('HSET', hot, 'd:' .. record[i], '0 0') end
end
local count = 0
for i = 7, #ARGV do
  local writes = unframe(ARGV[i])
  local stem = 'w:' .. id .. '\0' .. writes[5] .. '\0'
  for j = 8, #writes, 3 do
    redis.call('HSET', hot, stem .. writes[j], writes[6] .. '\0' .. writes[j + 1] .. '\0' .. writes[j + 2])
    count = count + 1
  end
end
redis.call('HSET', hot, 'wn', count)
redis.call('SADD', KEYS[2], record[3])
redis.call('SETBIT', KEYS[3], ARGV[6], 1)
if ARGV[3] ~= '0' then redis.call('PEXPIRE', hot, ARGV[3]) else redis.call('PERSIST', hot) end
if ARGV[4] ~= '0' then redis.call('PEXPIRE', KEYS[2], ARGV[4]) else redis.call('PERSIST', KEYS[2]) end
return 1
